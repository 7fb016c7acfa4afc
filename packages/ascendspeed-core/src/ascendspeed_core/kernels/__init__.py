"""Implementations of single operators: faster or smaller ones beside the plain torch that says what is right."""
