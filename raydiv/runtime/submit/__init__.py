"""A raydiv command as a Ray job: ``bundle`` and ``environment`` go with it, ``jobs`` submits and follows it."""
