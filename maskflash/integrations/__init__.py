"""Other libraries' own hooks -> attention under maskflash's masks; each module needs the library it is named after."""
