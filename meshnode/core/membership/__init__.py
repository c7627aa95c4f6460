"""Who is there: signed announcements, the roster they merge into, and the links that carry them."""
