"""Pictures and reports of what rankers do."""
