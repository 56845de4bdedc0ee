//! Large dense products through cuBLASLt, which is opened if it is there.
//!
//! The library counts columns first, so the row-major product `y = x wᵀ` is its `yᵀ = w xᵀ`: `w` as
//! it lies in memory is a transposed matrix to it, `x` a plain one.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUstream;

use super::backend::Product;

/// What the library's algorithms may use besides.
const WORKSPACE_BYTES: usize = 32 << 20;

/// `CUBLAS_OP_T`, which the bindings of this part of the library lack.
const OP_T: i32 = 1;

/// An opened library.
pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    /// The algorithm for each shape, which takes the library a while to choose.
    plans: Mutex<HashMap<Shape, Option<Plan>>>,
}

// SAFETY: the handle may be used from any thread, see the library's manual; the rest is behind a
// lock.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    num_tokens: usize,
    num_rows: usize,
    num_cols: usize,
    row_stride: usize,
    is_f32: bool,
}

/// Descriptions of a product's operands, and the algorithm.
#[derive(Clone, Copy)]
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl CublasLt {
    pub(super) const WORKSPACE_BYTES: usize = WORKSPACE_BYTES;

    /// Opens the library, if there is one. `workspace` is memory of [`Self::WORKSPACE_BYTES`].
    pub(super) fn open(workspace: u64) -> Option<Self> {
        // SAFETY: only tries to open the library.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        let handle = result::create_handle().ok()?;
        Some(Self { handle, workspace, plans: Mutex::default() })
    }

    /// Queues a product; false if the library has no algorithm for it.
    pub(super) fn multiply(&self, product: &Product, stream: CUstream) -> Result<bool, String> {
        let shape = Shape {
            num_tokens: product.num_tokens,
            num_rows: product.num_rows,
            num_cols: product.num_cols,
            row_stride: product.row_stride,
            is_f32: product.is_f32,
        };
        let plan = {
            let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the shape describes operands that are in memory, see `Product`.
            *plans.entry(shape).or_insert_with(|| unsafe { self.plan(shape) }.ok())
        };
        let Some(plan) = plan else { return Ok(false) };
        let (one, zero) = (1.0_f32, 0.0_f32);
        let pointer =
            |address: u64| std::ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        // SAFETY: the descriptions are those of the operands, whose memory is alive and large
        // enough for them; the work is queued on the stream that everything else is queued on.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                pointer(product.w),
                plan.w,
                pointer(product.x),
                plan.x,
                pointer(product.y),
                plan.y,
                pointer(product.y),
                plan.y,
                &raw const plan.algorithm,
                pointer(self.workspace),
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map(|()| true)
        .map_err(|error| format!("{error:?}"))
    }

    /// Asks the library for its best algorithm.
    ///
    /// # Safety
    /// Always safe: descriptions are made here and live as long as the program.
    unsafe fn plan(&self, shape: Shape) -> Result<Plan, result::CublasError> {
        let (bf16, f32) = (sys::cudaDataType::CUDA_R_16BF, sys::cudaDataType::CUDA_R_32F);
        let y_type = if shape.is_f32 { f32 } else { bf16 };
        let [tokens, rows, cols] =
            [shape.num_tokens, shape.num_rows, shape.num_cols].map(|n| n as u64);
        let operation =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32)?;
        let transposed = OP_T;
        let workspace_bytes = WORKSPACE_BYTES;
        let w = result::create_matrix_layout(bf16, cols, rows, shape.row_stride as i64)?;
        let x = result::create_matrix_layout(bf16, cols, tokens, cols as i64)?;
        let y = result::create_matrix_layout(y_type, rows, tokens, rows as i64)?;
        let preference = result::create_matmul_pref()?;
        // SAFETY: all were made above; the attributes are copied out of variables of their types.
        let found = unsafe {
            result::set_matmul_desc_attribute(
                operation,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of_val(&transposed),
            )?;
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace_bytes).cast(),
                size_of::<usize>(),
            )?;
            let found =
                result::get_matmul_algo_heuristic(self.handle, operation, w, x, y, y, preference);
            result::destroy_matmul_pref(preference)?;
            found?
        };
        Ok(Plan { operation, w, x, y, algorithm: found.algo })
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: made by `open` and destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
