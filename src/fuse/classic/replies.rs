//! Answers of the file system as fuser's replies.

use std::sync::Arc;

use fuser::{
    BackingId, FileHandle, FopenFlags, ReplyAttr, ReplyCreate, ReplyEmpty, ReplyOpen, ReplyWrite, ReplyXattr,
};

use super::convert::{GENERATION, IMAGE_OPEN, PASSED_OPEN, attr, errno};
use crate::fuse::TTL;
use crate::fuse::ops::{self, Answer, Attr};
use crate::io::backing::Registration;

pub(super) fn answer_empty(reply: ReplyEmpty, answer: Answer<()>) {
    match answer {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(e)),
    }
}

pub(super) fn answer_attr(reply: ReplyAttr, answer: Answer<Attr>) {
    match answer {
        Ok(a) => reply.attr(&TTL, &attr(&a)),
        Err(e) => reply.error(errno(e)),
    }
}

pub(super) fn answer_written(reply: ReplyWrite, answer: Answer<usize>) {
    match answer {
        // At most MAX_WRITE bytes were asked for.
        Ok(n) => reply.written(u32::try_from(n).unwrap_or(u32::MAX)),
        Err(e) => reply.error(errno(e)),
    }
}

pub(super) fn answer_opened(reply: ReplyOpen, answer: Answer<ops::Opened>) {
    match answer {
        Ok(o) => {
            let passed = o.backing.as_ref().and_then(|backing| {
                backing.register(|file| reply.open_backing(file).map(|id| Arc::new(id) as Registration))
            });
            match passed.as_ref().and_then(|registration| registration.downcast_ref::<BackingId>()) {
                Some(id) => reply.opened_passthrough(FileHandle(o.handle), PASSED_OPEN, id),
                None => {
                    reply.opened(
                        FileHandle(o.handle),
                        if o.direct { IMAGE_OPEN } else { FopenFlags::empty() },
                    );
                }
            }
        }
        Err(e) => reply.error(errno(e)),
    }
}

pub(super) fn answer_created(reply: ReplyCreate, answer: Answer<(Attr, ops::Opened)>) {
    match answer {
        Ok((a, o)) => {
            let flags = if o.direct { IMAGE_OPEN } else { FopenFlags::empty() };
            reply.created(&TTL, &attr(&a), GENERATION, FileHandle(o.handle), flags);
        }
        Err(e) => reply.error(errno(e)),
    }
}

/// `size` 0 asks how long the value is.
pub(super) fn answer_xattr(reply: ReplyXattr, size: u32, answer: Answer<Vec<u8>>) {
    match answer {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() <= size as usize => reply.data(&value),
        Ok(_) => reply.error(fuser::Errno::ERANGE),
        Err(e) => reply.error(errno(e)),
    }
}
