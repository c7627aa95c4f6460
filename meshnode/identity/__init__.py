"""Who: keys, node ids, certificates, invites and the list of signature domains. Pure."""
