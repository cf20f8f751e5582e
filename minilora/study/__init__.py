"""The study: a sweep over configurations, and everything that is a function of its rows."""
