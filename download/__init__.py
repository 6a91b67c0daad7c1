"""Data arrives, verified: the addresses and checksums, the mechanism. Imports no torch."""
