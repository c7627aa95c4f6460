"""Who may use whose memory, and how a run comes to serve: claims, grants, the ledger, the run's transition table."""
