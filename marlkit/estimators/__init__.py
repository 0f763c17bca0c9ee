"""Estimators: they turn rewards and values into advantages and value targets."""
