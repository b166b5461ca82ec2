"""Readers of other libraries' quantized layers, a file for each library.

A reader takes a module and returns its weight as a `QuantizedWeight`, None if the module is not of
its library, or the reason, a string, why the module stays as it is. It knows a layer by its
attributes and imports no library.
"""
