"""The workloads of `bench_peers.py`: what each of them is, here and in the libraries that it is compared with."""
