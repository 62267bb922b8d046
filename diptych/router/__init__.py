"""Who serves a request: picks servers, passes requests on and answers back, and keeps clear of servers that fail."""
