//! Tensor operations, one file per op: the public function, the CPU code, the unit test.
//!
//! **Invariant:** an op's result for one row depends on nothing but that row: not on the other rows
//! of the batch, on how a prompt was cut into steps, on the number of threads or on where in the
//! cache a block lies. Every float operation of an output element has a fixed order.

pub mod add_scaled;
pub mod embedding;
pub mod experts;
pub mod fp8_weights;
pub mod gather_columns;
pub mod gather_rows;
pub mod gguf_blocks;
mod grid;
pub mod grouped_weights;
pub mod head_norm;
pub mod indices;
pub mod kv_cache;
pub mod low_rank;
pub mod matmul;
mod operand;
pub mod paged_attention;
pub mod quantize_rows;
pub mod random_rows;
pub mod rms_norm;
pub mod rope;
pub mod row_format;
mod rows;
pub mod sample;
pub mod silu_mul;
mod simd;
pub mod tensor;
