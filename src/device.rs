//! What the machine is made of: threads today, accelerators beside them.

pub mod threads;
