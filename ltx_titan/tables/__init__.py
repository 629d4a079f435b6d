"""Tables and folders that list clips and captions: read and written without the media libraries."""
