"""Where the time of an iteration goes, and how it compares with a bare loop, a peer and the floating-point limit."""
