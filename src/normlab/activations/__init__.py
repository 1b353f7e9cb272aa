"""Methods that normalize activations, one a file."""
