package sock

import "golang.org/x/sys/unix"

// The TCP states of the kernel (include/net/tcp_states.h) that ask looks for.
const (
	tcpClose     = 7
	tcpCloseWait = 8
	tcpLastAck   = 9
	tcpClosing   = 11
)

func ask(fd int) (info Info, ok bool) {
	// Neither call fails on an open stream socket; an error leaves the zero.
	info.Unread, _ = unix.IoctlGetInt(fd, unix.SIOCINQ)
	info.Unsent, _ = unix.IoctlGetInt(fd, unix.SIOCOUTQ)
	if tcp, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
		info.Acked = tcp.Bytes_acked
		switch tcp.State {
		case tcpClose:
			info.Reset = true
		case tcpCloseWait, tcpLastAck, tcpClosing:
			info.Finished = true
		}
		return info, true
	}
	return askPoll(fd, info)
}

// askPoll tells of a Unix socket what TCP_INFO tells of a TCP one.
func askPoll(fd int, info Info) (Info, bool) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	if _, err := unix.Poll(fds, 0); err != nil {
		return info, false
	}
	// A Unix socket has POLLHUP when the peer has closed it, also after all of
	// its data; only with nothing left to read is that as final as a reset.
	info.Finished = fds[0].Revents&(unix.POLLRDHUP|unix.POLLHUP) != 0
	info.Reset = fds[0].Revents&unix.POLLHUP != 0 && info.Unread == 0
	return info, true
}
