"""Any defence under the whole strict protocol, in one call."""
