"""Methods on one weight matrix: pure numpy, one file each, never a graph."""
