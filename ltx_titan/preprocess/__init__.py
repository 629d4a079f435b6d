from ltx_titan.preprocess.debug_dataset import make_debug_dataset
from ltx_titan.preprocess.process_dataset import ProcessOptions, process_dataset
from ltx_titan.preprocess.report import Report

__all__ = ["ProcessOptions", "Report", "make_debug_dataset", "process_dataset"]
