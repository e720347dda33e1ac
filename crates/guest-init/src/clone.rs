//! Starting a process: the part between clone and execve.
//!
//! The child shares our memory until it calls execve (`CLONE_VM | CLONE_VFORK`; the parent is stopped meanwhile), because
//! copying page tables is what makes fork slow under emulation, and it is born in its cgroup (`CLONE_INTO_CGROUP`), so
//! that nothing it starts is ever outside. Between the two it makes system calls and nothing else: no allocation, no
//! lock, no destructor. What went wrong it writes to the memory it shares.

use std::arch::asm;
use std::ffi::c_char;
use std::io;

use rustix::io::Errno;

/// Everything the child needs, prepared by the parent. All pointers and descriptors outlive the call to [`start`].
pub(crate) struct Child {
    /// Becomes 0, 1 and 2. None of them is one of these numbers.
    pub(crate) stdio: [i32; 3],
    /// Whether standard input is a terminal to be controlled by.
    pub(crate) terminal: bool,
    /// Mount namespace to enter.
    pub(crate) namespace: i32,
    /// Directory to start in.
    pub(crate) cwd: i32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: *const u32,
    pub(crate) group_count: usize,
    /// Null-terminated array of paths to try.
    pub(crate) candidates: *const *const c_char,
    pub(crate) argv: *const *const c_char,
    pub(crate) envp: *const *const c_char,
    /// Written by the child when it fails.
    pub(crate) failure: Failure,
}

/// Where the child failed, and why; `errno` 0 when it has not.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Failure {
    pub(crate) step: &'static str,
    pub(crate) errno: i32,
}

/// Bytes of stack for the child. It calls a handful of system calls; the rest is for the compiler's taste.
const STACK: usize = 64 * 1024;

/// `struct clone_args`, linux/sched.h.
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// `CLONE_INTO_CGROUP`, linux/sched.h; libc's constant does not fit its own type on some targets.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Starts the child in the cgroup whose directory is `cgroup`; returns its process id. When it could not execute its
/// program, it has ended, `child.failure` says why, and the reaper will collect it.
pub(crate) fn start(child: &mut Child, cgroup: i32) -> io::Result<u32> {
    // Signals stay blocked until the child has put back their defaults.
    let _blocked = BlockedSignals::new();
    let mut stack = vec![0u64; STACK / size_of::<u64>()];
    let args = CloneArgs {
        flags: CLONE_INTO_CGROUP | (libc::CLONE_VM | libc::CLONE_VFORK) as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: STACK as u64,
        cgroup: u64::try_from(cgroup).map_err(|_| Errno::BADF)?,
        ..CloneArgs::default()
    };
    // SAFETY: `args` is a valid `clone_args`, the stack is ours alone and 16-byte aligned at its top, and the parent does
    // not run, so keeps everything `child` points to, until the child has called execve or ended. `enter` never returns.
    let result = unsafe { clone3(&raw const args, std::ptr::from_mut(child)) };
    drop(stack);
    u32::try_from(result)
        .map_err(|_| io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EINVAL)))
}

/// The system call, and in the child a call of [`enter`] on the new stack.
#[cfg(target_arch = "x86_64")]
unsafe fn clone3(args: *const CloneArgs, child: *mut Child) -> i64 {
    let result: i64;
    // SAFETY: as the caller promises. In the child, the stack pointer is the new stack's top and nothing of the parent's
    // frame is touched; registers other than those written down survive the system call.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "and rsp, -16",
            "mov rdi, {child}",
            "call {enter}",
            "ud2",
            "2:",
            child = in(reg) child,
            enter = sym enter,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") args,
            in("rsi") size_of::<CloneArgs>(),
            out("rcx") _,
            out("r11") _,
        );
    }
    result
}

/// The system call, and in the child a call of [`enter`] on the new stack.
#[cfg(target_arch = "aarch64")]
unsafe fn clone3(args: *const CloneArgs, child: *mut Child) -> i64 {
    let result: i64;
    // SAFETY: as for x86_64.
    unsafe {
        asm!(
            "svc 0",
            "cbnz x0, 2f",
            "mov x29, xzr",
            "mov x30, xzr",
            "mov x0, {child}",
            "bl {enter}",
            "brk 1",
            "2:",
            child = in(reg) child,
            enter = sym enter,
            inlateout("x0") args => result,
            in("x1") size_of::<CloneArgs>(),
            in("x8") libc::SYS_clone3,
            out("x30") _,
        );
    }
    result
}

/// The child's life before its program.
unsafe extern "C" fn enter(child: *mut Child) -> ! {
    // SAFETY: the parent passed a pointer to its own `Child` and is stopped; we are the only one to use it.
    let child = unsafe { &mut *child };
    child.failure = become_program(child);
    // SAFETY: ends this process at once, without running anything of the parent's.
    unsafe {
        libc::syscall(libc::SYS_exit_group, 127);
    }
    loop {
        std::hint::spin_loop();
    }
}

/// Returns only when it has failed.
fn become_program(child: &Child) -> Failure {
    // Raw system calls throughout: the C library's wrappers of some of these talk to other threads or take locks.
    macro_rules! call {
        ($step:literal, $number:expr $(, $argument:expr)*) => {{
            // SAFETY: the arguments are numbers, or point to memory that the stopped parent keeps.
            let result = unsafe { libc::syscall($number $(, $argument)*) };
            if result < 0 {
                return Failure { step: $step, errno: errno() };
            }
            result
        }};
    }
    // SAFETY: sets a disposition; PID 1 ignores the signal, which programs do not expect.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    call!("starting a session", libc::SYS_setsid);
    if child.terminal {
        let [stdin, ..] = child.stdio;
        call!(
            "taking the terminal",
            libc::SYS_ioctl,
            stdin,
            libc::TIOCSCTTY,
            0usize
        );
    }
    call!(
        "entering the agent's root",
        libc::SYS_setns,
        child.namespace,
        libc::CLONE_NEWNS
    );
    for (from, to) in child.stdio.into_iter().zip(0i32..) {
        call!("connecting input and output", libc::SYS_dup3, from, to, 0);
    }
    call!(
        "taking on the groups",
        libc::SYS_setgroups,
        child.group_count,
        child.groups
    );
    call!(
        "taking on the group",
        libc::SYS_setresgid,
        child.gid,
        child.gid,
        child.gid
    );
    call!(
        "taking on the user",
        libc::SYS_setresuid,
        child.uid,
        child.uid,
        child.uid
    );
    call!(
        "entering the working directory",
        libc::SYS_fchdir,
        child.cwd
    );
    let none = 0u64;
    call!(
        "unblocking signals",
        libc::SYS_rt_sigprocmask,
        libc::SIG_SETMASK,
        &raw const none,
        std::ptr::null::<u64>(),
        size_of::<u64>()
    );
    Failure {
        step: "executing the program",
        errno: execute(child),
    }
}

/// Tries the candidates in order, as execvp does; returns the reason why none could be executed.
fn execute(child: &Child) -> i32 {
    let mut reason = libc::ENOENT;
    let mut candidate = child.candidates;
    loop {
        // SAFETY: the array ends with a null pointer and is not left before that.
        let path = unsafe { *candidate };
        if path.is_null() {
            return reason;
        }
        // SAFETY: path, argv and envp are C strings and null-terminated arrays that the stopped parent keeps.
        unsafe { libc::syscall(libc::SYS_execve, path, child.argv, child.envp) };
        match errno() {
            libc::ENOENT | libc::ENOTDIR => {}
            // One that may not be executed counts only if no other is found.
            libc::EACCES => reason = libc::EACCES,
            other => return other,
        }
        // SAFETY: this one was not the terminating null.
        candidate = unsafe { candidate.add(1) };
    }
}

fn errno() -> i32 {
    // SAFETY: the location is the parent thread's, which is stopped.
    unsafe { *libc::__errno_location() }
}

/// Blocks all signals until dropped.
struct BlockedSignals {
    before: libc::sigset_t,
}

impl BlockedSignals {
    fn new() -> Self {
        // SAFETY: zeroed sets are valid values, filled and read by the calls.
        unsafe {
            let mut before: libc::sigset_t = std::mem::zeroed();
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::sigprocmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
            Self { before }
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: restores the set that `new` has read.
        unsafe {
            libc::sigprocmask(
                libc::SIG_SETMASK,
                &raw const self.before,
                std::ptr::null_mut(),
            );
        }
    }
}
