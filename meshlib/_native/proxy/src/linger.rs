//! How does a peer that was refused get to read why? Its socket stays open a moment longer, and what it still sends is thrown away.
//!
//! A socket that is closed while bytes wait in it resets the connection, and the reset overtakes the answer.
use std::future::poll_fn;
use std::task::{ready, Poll};

use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc::{unbounded_channel, UnboundedReceiver, UnboundedSender};
use tokio::time::timeout;

use crate::limits;
use crate::socket::Socket;

/// Where such sockets are left.
#[derive(Clone)]
pub struct Lingering(UnboundedSender<(Socket, Vec<u8>)>);

impl Lingering {
    pub fn new() -> (Lingering, UnboundedReceiver<(Socket, Vec<u8>)>) {
        let (sender, receiver) = unbounded_channel();
        (Lingering(sender), receiver)
    }

    pub fn take_over(&self, socket: Socket, unsent: Vec<u8>) {
        // Nobody takes it where the worker ends: then it is closed.
        let _ = self.0.send((socket, unsent));
    }
}

/// Takes the sockets as they come; runs as long as the worker.
pub async fn run(mut left: UnboundedReceiver<(Socket, Vec<u8>)>) {
    while let Some((socket, unsent)) = left.recv().await {
        tokio::task::spawn_local(async move {
            let _ = timeout(limits::LINGER, finish(socket, unsent)).await;
        });
    }
}

async fn finish(mut socket: Socket, unsent: Vec<u8>) -> std::io::Result<()> {
    match &mut socket {
        Socket::Tcp(socket) => socket.write_all(&unsent).await?,
        Socket::Unix(socket) => socket.write_all(&unsent).await?,
    }
    poll_fn(|context| socket.poll_shutdown(context)).await?;
    let mut room = limits::LINGER_BYTES;
    poll_fn(|context| loop {
        let count = ready!(socket.poll_piece(context, <[u8]>::len))?;
        room = room.saturating_sub(count);
        if count == 0 || room == 0 {
            return Poll::Ready(Ok(()));
        }
    })
    .await
}
