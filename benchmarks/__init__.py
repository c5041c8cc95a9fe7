"""Each of these files measures one claim, side by side with a peer. See README.md."""
