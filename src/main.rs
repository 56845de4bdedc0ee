//! The `qwen-server` binary: runs the command line and reports how that went.

use std::process::ExitCode;

use qwen_server::cli;
use qwen_server::device::reserve::ReservingAllocator;

#[global_allocator]
static ALLOCATOR: ReservingAllocator = ReservingAllocator;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::report(&error),
    }
}
