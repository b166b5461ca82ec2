"""Helpers of several packages of tests."""
