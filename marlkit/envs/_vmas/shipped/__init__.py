"""Scenarios of VMAS that marlkit ships; each module holds one class `Scenario` and is named as the scenario is."""
