"""The parts of a preprocessing run: its job, workers, output files, packing and journal."""
