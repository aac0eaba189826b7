"""Other libraries' attention kernels, called by name with a mask in their own form: `backend="flex"` and its like."""
