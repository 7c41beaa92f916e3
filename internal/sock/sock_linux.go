package sock

import "golang.org/x/sys/unix"

func ask(fd int) (info Info, ok bool) {
	events, err := Poll(fd, unix.POLLRDHUP)
	if err != nil {
		return info, false
	}
	// A pending error is what tells a reset from an end on both sides, after
	// which TCP's own state says the same for either.
	info.Reset = events&unix.POLLERR != 0
	info.Finished = events&(unix.POLLRDHUP|unix.POLLHUP) != 0
	// These do not fail on an open stream socket; an error leaves the zero.
	info.Unread, _ = unix.IoctlGetInt(fd, unix.SIOCINQ)
	info.Unacked, _ = unix.IoctlGetInt(fd, unix.SIOCOUTQ)
	if tcp, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
		info.Acked, info.Unsent = tcp.Bytes_acked, int(tcp.Notsent_bytes)
	}
	return info, true
}

// Poll returns those of the events asked for that are there, and POLLERR and POLLHUP. It
// does not wait.
func Poll(fd int, asked int16) (events int16, err error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: asked}}
	for {
		if _, err = unix.Poll(fds, 0); err != unix.EINTR { // the runtime's signals interrupt it, too
			return fds[0].Revents, err
		}
	}
}
