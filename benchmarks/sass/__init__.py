"""What a compiled kernel's machine code (SASS) says of its speed; nothing here runs a kernel."""
