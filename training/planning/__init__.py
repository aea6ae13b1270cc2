"""From trained heads to an exit plan."""
