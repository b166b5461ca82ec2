"""The ops: public functions, argument checks, autograd Functions, schemas and dispatch."""
