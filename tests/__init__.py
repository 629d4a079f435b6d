import os

# Before torch is imported, also under plain `pytest`: a process that was forked after OpenMP has made threads waits for
# them forever, and sums over several threads have other bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
