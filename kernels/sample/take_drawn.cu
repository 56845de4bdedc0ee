// The tokens that rows just drew, as the next step's input: ids[i] = results[rows[i]].token, or zero
// where nothing could be drawn, whose sequence goes no further.
//
// Shapes: results SampleResult [num_results]; rows u32 [num_ids]; ids u32 [num_ids].
// Grid (num_ids / 256), 256 threads.
//
// Bytes: 16 for each id. Bound by the latency of its launch.
#include "sample_row.cuh"

extern "C" __global__ void __launch_bounds__(256)
    take_drawn(const SampleResult* results, const uint32_t* rows, uint32_t* ids, int num_ids) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < num_ids) {
        const SampleResult& result = results[rows[i]];
        ids[i] = result.status == 0 ? result.token : 0;
    }
}
KERNEL(take_drawn);
