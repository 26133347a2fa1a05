"""Networks: one model a file, its configuration and sources on top. Blocks that several of them use are in `blocks`."""
