"""The mediator: one place that sees every core part. `handle(event, now) -> effects`."""
