package sock

import "golang.org/x/sys/unix"

func ask(fd int) (info Info, ok bool) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	for {
		_, err := unix.Poll(fds, 0)
		if err == nil {
			break
		}
		if err != unix.EINTR { // the runtime's signals interrupt it, too
			return info, false
		}
	}
	// A pending error is what tells a reset from an end on both sides, after
	// which TCP's own state says the same for either.
	info.Reset = fds[0].Revents&unix.POLLERR != 0
	info.Finished = fds[0].Revents&(unix.POLLRDHUP|unix.POLLHUP) != 0
	// These do not fail on an open stream socket; an error leaves the zero.
	info.Unread, _ = unix.IoctlGetInt(fd, unix.SIOCINQ)
	info.Unacked, _ = unix.IoctlGetInt(fd, unix.SIOCOUTQ)
	if tcp, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
		info.Acked, info.Unsent = tcp.Bytes_acked, int(tcp.Notsent_bytes)
	}
	return info, true
}
