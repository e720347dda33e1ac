//! A host, a world behind it and guests, all in namespaces of the test's own: nothing of it reaches the machine's
//! network, and it is gone when its descriptors are.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::net::{GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, GUEST_PREFIX};
use crate::net::{namespace, route::Route, tap};

/// linux/sockios.h; asks a socket for its namespace.
const SIOCGSKNS: libc::c_ulong = 0x894c;

/// The calling thread's host, until this is dropped. A launcher that the thread forks has its hubs there.
#[derive(Debug)]
pub struct TestWorld {
    machine: OwnedFd,
    host: OwnedFd,
    world: OwnedFd,
}

impl TestWorld {
    /// Everybody out there, at the end of the host's default route; [`TestWorld::add_address`] makes it more.
    pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
    /// The host's own address towards the world.
    pub const HOST: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);

    /// Moves the calling thread there. Needs root.
    pub fn enter() -> io::Result<TestWorld> {
        let machine = namespace::current()?;
        let made = (|| {
            let world = namespace::enter_new()?;
            up("lo")?;
            let host = namespace::enter_new()?;
            up("lo")?;
            let mut links = Route::open()?;
            links.add_veth("world", "host", &world)?;
            let link = links.index("world")?;
            links.add_address(link, Self::HOST, 15)?;
            links.set_up(link)?;
            namespace::enter(&world)?;
            let mut there = Route::open()?;
            let link = there.index("host")?;
            there.add_address(link, Self::ADDRESS, 15)?;
            there.set_up(link)?;
            namespace::enter(&host)?;
            links.add_default_route(Self::ADDRESS)?;
            Ok((host, world))
        })();
        match made {
            Ok((host, world)) => Ok(TestWorld {
                machine,
                host,
                world,
            }),
            Err(e) => {
                namespace::enter(&machine)?;
                Err(e)
            }
        }
    }

    /// Lets the world answer to another address.
    pub fn add_address(&self, address: Ipv4Addr) -> io::Result<()> {
        self.there(|| add_address("host", address))?
    }

    /// Runs something in the world: sockets it opens stay there.
    pub fn there<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        within(&self.world, work)
    }

    /// Whether the host has a link of this name.
    pub fn has_link(&self, name: &str) -> io::Result<bool> {
        within(&self.host, || match Route::open()?.index(name) {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(false),
            Err(e) => Err(e),
        })?
    }
}

impl Drop for TestWorld {
    fn drop(&mut self) {
        let _ = namespace::enter(&self.machine);
    }
}

fn up(link: &str) -> io::Result<()> {
    let mut links = Route::open()?;
    let link = links.index(link)?;
    links.set_up(link)
}

/// Gives a link of the calling thread's namespace an address.
pub fn add_address(link: &str, address: Ipv4Addr) -> io::Result<()> {
    let mut links = Route::open()?;
    let link = links.index(link)?;
    links.add_address(link, address, 32)
}

/// Runs something in a namespace, on the calling thread, which returns to where it was.
pub fn within<T>(there: impl AsFd, work: impl FnOnce() -> T) -> io::Result<T> {
    let here = namespace::current()?;
    namespace::enter(there)?;
    let result = work();
    namespace::enter(here)?;
    Ok(result)
}

/// The namespace a socket was opened in.
pub fn namespace_of(socket: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open, and the call takes no further argument.
    let fd = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCGSKNS as _) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The names of a namespace's links.
pub fn links(there: impl AsFd) -> io::Result<Vec<String>> {
    let text = within(there, || {
        std::fs::read_to_string("/proc/thread-self/net/dev")
    })??;
    let names = text
        .lines()
        .skip(2)
        .filter_map(|line| line.split(':').next());
    Ok(names.map(|name| name.trim().to_owned()).collect())
}

/// A kernel that stands in for a VM's: a namespace with the guest's addresses, whose network card is wired to a tap.
#[derive(Debug)]
pub struct TestGuest {
    namespace: OwnedFd,
    stop: OwnedFd,
    wire: Option<JoinHandle<()>>,
}

impl TestGuest {
    /// Plugs one into the device of a VM's network.
    pub fn new(device: OwnedFd) -> io::Result<TestGuest> {
        let here = namespace::current()?;
        let made = (|| {
            let namespace = namespace::enter_new()?;
            // The same kind of device in the guest's place: frames and their virtio-net headers pass as they are.
            let card = tap::open()?;
            let mut links = Route::open()?;
            let link = links.index(tap::NAME)?;
            links.set_up_as(link, GUEST_MAC)?;
            links.add_address(link, GUEST_ADDRESS, GUEST_PREFIX)?;
            links.add_neighbour(link, GATEWAY_ADDRESS, GATEWAY_MAC)?;
            links.add_default_route(GATEWAY_ADDRESS)?;
            Ok::<_, io::Error>((namespace, card))
        })();
        namespace::enter(here)?;
        let (namespace, card) = made?;
        let (stop, stopped) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map(|(read, write)| (write, read))?;
        let wire = std::thread::spawn(move || wire(&device, &card, &stopped));
        Ok(TestGuest {
            namespace,
            stop,
            wire: Some(wire),
        })
    }

    /// Runs something in the guest: sockets it opens stay there.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        within(&self.namespace, work)
    }

    /// Gives it an address that is not its own.
    pub fn add_address(&self, address: Ipv4Addr) -> io::Result<()> {
        self.run(|| add_address(tap::NAME, address))?
    }
}

impl Drop for TestGuest {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, b"x");
        if let Some(wire) = self.wire.take() {
            let _ = wire.join();
        }
    }
}

/// Carries frames both ways until it is told to stop.
fn wire(one: &OwnedFd, other: &OwnedFd, stopped: &OwnedFd) {
    let mut frame = vec![0; 70_000];
    loop {
        let mut fds = [one, other, stopped].map(|fd| PollFd::new(fd, PollFlags::IN));
        if rustix::event::poll(&mut fds, None).is_err() {
            return;
        }
        let [_, _, stop] = &fds;
        if !stop.revents().is_empty() {
            return;
        }
        for (from, to) in [(one, other), (other, one)] {
            while let Ok(length) = rustix::io::read(from, &mut frame) {
                // A full or closed device loses frames, as wires do.
                match rustix::io::write(to, frame.get(..length).unwrap_or_default()) {
                    Ok(_) | Err(Errno::AGAIN | Errno::IO) => {}
                    Err(_) => return,
                }
            }
        }
    }
}
