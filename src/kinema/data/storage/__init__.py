"""Where bytes come from: folders and addresses, tried again when they fail, kept on the local disk."""
