from ltx_titan.inspection.inspect_data import InspectOptions, inspect_data

__all__ = ["InspectOptions", "inspect_data"]
