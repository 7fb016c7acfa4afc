"""Proof that runs are equal: parity of layouts, comparison of losses."""
