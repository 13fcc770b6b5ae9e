"""What tribill is measured against: one small program a peer, in an environment of their own."""
