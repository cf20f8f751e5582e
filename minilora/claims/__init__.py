"""Claims of the papers, checked by experiment: each study trains or quantizes, then writes rows and a page.

`merge_study` asks what each way of merging an adapter costs. `quantization_study` asks what a weight, and a
whole model, lose in few bits.
"""
