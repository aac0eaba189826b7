"""A mask expression at given lengths -> what its rows see, and the map of full, partial and empty tiles."""
