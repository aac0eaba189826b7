"""Which tiles of the attention matrix to visit: the block map, and how it is found."""
