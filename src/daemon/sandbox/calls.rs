//! The system calls that a confined daemon may make.
//!
//! What is not here is answered with ENOSYS, as by a kernel that does not have it: libraries then fall back to what
//! they used before (clone3 to clone, for one, whose flags can be looked at). Nothing is killed: a call that the list
//! forgets must not take the disks of running guests away.
//!
//! That the list is whole: it was made from traces of the tests, then filled up by sort, so that a libc that prefers
//! another call of the same sort finds it. A process that may read, write, map and wait gains no power by doing it with
//! another call. Calls that take a path and look at nothing that Landlock restricts (chmod, chown, xattr, utime) are
//! left out, and so is making an io_uring, which would go around this list. The rings that were made before may be entered,
//! and switched on by their threads; what they carry out is bound when they are made (see io/reads and fuse/uring/ring).

use std::collections::BTreeMap;

use anyhow::Context;
use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use crate::fuse::session::Transport;
use crate::io::backing;

/// Allowed whatever the arguments are.
const FREE: &[c_long] = &[
    // Files: content.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_copy_file_range,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_syncfs,
    // Files: names, which Landlock holds to the images folder; what makes files is below.
    libc::SYS_close,
    libc::SYS_getdents64,
    libc::SYS_unlinkat,
    libc::SYS_linkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    // Files: state. Owner and mode of open files only.
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_fchown,
    libc::SYS_flock,
    libc::SYS_dup,
    libc::SYS_dup3,
    // Waiting, and wake-ups.
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_io_uring_enter,
    libc::SYS_inotify_rm_watch,
    // The control socket, which was bound before. `sendmsg` goes to no address either: there are connections only, and of
    // those the kernel takes none.
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_membarrier,
    // Threads, signals, time.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getcpu,
    libc::SYS_gettid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    // The process, and the machine.
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrusage,
    libc::SYS_getrandom,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// Older forms of the same, which a libc may use where they exist.
#[cfg(target_arch = "x86_64")]
const OLDER: &[c_long] = &[
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_link,
    libc::SYS_rename,
    libc::SYS_dup2,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_wait,
    libc::SYS_accept,
    libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[c_long] = &[];

/// Requests for `ioctl`: FICLONE and FICLONERANGE (extents that two files share), FIONBIO and FIOCLEX (flags of a
/// descriptor).
const REQUESTS: &[u32] = &[0x4004_9409, 0x4020_940d, 0x5421, 0x5451];

/// With passthrough: a host file is registered with the mount, and given back.
const PASSING: &[u32] = &[backing::OPEN_REQUEST, backing::CLOSE_REQUEST];

/// Mode bits with which a program runs as its owner or group (04000, 02000).
const LENDING: u64 = (libc::S_ISUID | libc::S_ISGID) as u64;

/// Flags of `clone` that make namespaces.
const NEW_SPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;

/// The part of a socket's type that is no flag.
const SOCKET_TYPE: u64 = 0xf;

/// What is set of a socket: how long a client may be silent.
const TIMEOUTS: &[libc::c_int] = &[libc::SO_RCVTIMEO, libc::SO_SNDTIMEO];

/// Commands for `fcntl`.
const COMMANDS: &[u64] = &[
    libc::F_DUPFD as u64,
    libc::F_DUPFD_CLOEXEC as u64,
    libc::F_GETFD as u64,
    libc::F_SETFD as u64,
    libc::F_GETFL as u64,
    libc::F_SETFL as u64,
    libc::F_GETLK as u64,
    libc::F_SETLK as u64,
    libc::F_SETLKW as u64,
    libc::F_OFD_GETLK as u64,
    libc::F_OFD_SETLK as u64,
    libc::F_OFD_SETLKW as u64,
];

/// IORING_REGISTER_ENABLE_RINGS: switches on a ring that was made switched off, once.
const ENABLE_RINGS: u64 = 12;

/// The filter for this machine, this process and this transport, with passthrough or without.
pub(super) fn filter(transport: Transport, passthrough: bool) -> anyhow::Result<BpfProgram> {
    let arch = std::env::consts::ARCH.try_into().context("no filter can be made for this kind of machine")?;
    let refusal = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    Ok(SeccompFilter::new(rules(transport, passthrough)?, refusal, SeccompAction::Allow, arch)?.try_into()?)
}

fn rules(transport: Transport, passthrough: bool) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let argument = |index: u8, operator: SeccompCmpOp, value: u64| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)
    };
    let is = |index: u8, value: u64| argument(index, SeccompCmpOp::Eq, value);
    let one_of = |index: u8, values: &[u64]| -> Result<Vec<SeccompRule>, BackendError> {
        values.iter().map(|value| SeccompRule::new(vec![is(index, *value)?])).collect()
    };
    let bits = |index: u8, mask: u64, value: u64| -> Result<Vec<SeccompRule>, BackendError> {
        Ok(vec![SeccompRule::new(vec![argument(index, SeccompCmpOp::MaskedEq(mask), value)?])?])
    };
    let passing = if passthrough { PASSING } else { &[] };
    let requests: Vec<u64> = REQUESTS.iter().chain(passing).map(|request| u64::from(*request)).collect();
    let (thread, execute) = (libc::CLONE_THREAD as u64, libc::PROT_EXEC as u64);
    let no_pointer = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    let (thread_flags, not_set) = (thread | NEW_SPACES | libc::CSIGNAL as u64, 0);
    let no_address = SeccompCondition::new(4, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    let timeouts: Result<Vec<SeccompRule>, BackendError> = TIMEOUTS
        .iter()
        .map(|name| SeccompRule::new(vec![is(1, libc::SOL_SOCKET as u64)?, is(2, *name as u64)?]))
        .collect();
    let stream = vec![SeccompRule::new(vec![
        is(0, libc::AF_UNIX as u64)?,
        argument(1, SeccompCmpOp::MaskedEq(SOCKET_TYPE), libc::SOCK_STREAM as u64)?,
    ])?];
    let mut limited = vec![
        // Names, which Landlock holds to the images folder. No file becomes one that lends its owner's powers: with that
        // and any program of another user's, a daemon that was taken over would be root outside of all this.
        (libc::SYS_openat, bits(3, LENDING, not_set)?),
        (libc::SYS_mkdirat, bits(2, LENDING, not_set)?),
        (libc::SYS_fchmod, bits(1, LENDING, not_set)?),
        // Flags and locks of descriptors; not whom a signal goes to.
        (libc::SYS_fcntl, one_of(1, COMMANDS)?),
        // Answers on connections: no datagram to a socket of another's, which takes any word for root's.
        (libc::SYS_sendto, vec![SeccompRule::new(vec![no_address])?]),
        (libc::SYS_setsockopt, timeouts?),
        (libc::SYS_ioctl, one_of(1, &requests)?),
        // Memory is for data: none of it becomes a program.
        (libc::SYS_mmap, bits(2, execute, 0)?),
        (libc::SYS_mprotect, bits(2, execute, 0)?),
        // Threads, not processes, and none with namespaces of its own, in which it would have all powers.
        (libc::SYS_clone, bits(0, thread_flags, thread)?),
        // Names of threads.
        (libc::SYS_prctl, one_of(0, &[libc::PR_SET_NAME as u64, libc::PR_GET_NAME as u64])?),
        (libc::SYS_socketpair, stream),
        // Its own limits are read, not set.
        (libc::SYS_prlimit64, vec![SeccompRule::new(vec![is(0, 0)?, no_pointer])?]),
        // abort() signals its own process.
        (libc::SYS_tgkill, one_of(0, &[std::process::id().into()])?),
    ];
    #[cfg(target_arch = "x86_64")]
    limited.extend([
        (libc::SYS_open, bits(2, LENDING, not_set)?),
        (libc::SYS_mkdir, bits(1, LENDING, not_set)?),
    ]);
    if transport == Transport::Uring {
        // Its threads are bound to CPUs, each by itself.
        limited.push((libc::SYS_sched_setaffinity, one_of(0, &[0])?));
        // And so do they take their rings.
        limited.push((libc::SYS_io_uring_register, one_of(1, &[ENABLE_RINGS])?));
    }
    let free = FREE.iter().chain(OLDER).map(|call| (*call, Vec::new()));
    Ok(free.chain(limited).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_starts_mounts_traces_loads_or_goes_around_the_list_is_on_it() {
        let fuse = rules(Transport::Fuse, false).expect("a sound list");
        let uring = rules(Transport::Uring, false).expect("a sound list");
        let never = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_clone3,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_kill,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_move_mount,
            libc::SYS_open_tree,
            libc::SYS_fsopen,
            libc::SYS_pivot_root,
            libc::SYS_chroot,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_kexec_load,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_register,
            libc::SYS_open_by_handle_at,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_mknodat,
            libc::SYS_symlinkat,
            libc::SYS_fchmodat,
            libc::SYS_fchownat,
            libc::SYS_setxattr,
            libc::SYS_setuid,
            libc::SYS_reboot,
            libc::SYS_swapon,
            libc::SYS_keyctl,
            // Its mode lies in memory, where a filter does not look.
            libc::SYS_openat2,
            libc::SYS_fchmodat2,
            libc::SYS_sendmmsg,
            libc::SYS_capset,
            libc::SYS_inotify_init1,
            libc::SYS_inotify_add_watch,
        ];
        let listed = |call: &c_long| fuse.contains_key(call) || uring.contains_key(call);
        let found: Vec<c_long> = never.into_iter().filter(listed).collect();
        // Its one use is looked at below.
        assert_eq!(found, [libc::SYS_io_uring_register]);
        assert!(!fuse.contains_key(&libc::SYS_io_uring_register));
    }

    #[test]
    fn the_uring_transport_has_two_calls_more_each_for_one_thing() {
        let uring = rules(Transport::Uring, false).expect("a sound list");
        let fuse = rules(Transport::Fuse, false).expect("a sound list");
        let more: Vec<_> = uring.iter().filter(|(call, _)| !fuse.contains_key(call)).collect();
        let calls: Vec<c_long> = more.iter().map(|(call, _)| **call).collect();
        assert_eq!(calls, [libc::SYS_sched_setaffinity, libc::SYS_io_uring_register], "by number");
        let is = |index, value| {
            let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value);
            vec![SeccompRule::new(vec![condition.expect("sound")]).expect("sound")]
        };
        assert_eq!(uring[&libc::SYS_sched_setaffinity], is(0, 0), "the calling thread only");
        assert_eq!(uring[&libc::SYS_io_uring_register], is(1, ENABLE_RINGS), "switched on, and nothing else");
    }
}
