from ltx_titan.preprocess.debug_dataset import make_debug_dataset
from ltx_titan.preprocess.options import ProcessOptions
from ltx_titan.preprocess.process_captions import process_captions
from ltx_titan.preprocess.process_dataset import process_dataset
from ltx_titan.preprocess.process_videos import process_videos
from ltx_titan.preprocess.report import Report

__all__ = ["ProcessOptions", "Report", "make_debug_dataset", "process_captions", "process_dataset", "process_videos"]
