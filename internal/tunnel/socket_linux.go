package tunnel

import (
	"math"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

// setUserTimeout sets TCP_USER_TIMEOUT, in milliseconds, rounded up.
func setUserTimeout(socket syscall.Conn, d time.Duration) error {
	ms := min(d/time.Millisecond+min(d%time.Millisecond, 1), math.MaxInt32)
	return control(socket, func(fd int) error {
		return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(ms)))
	})
}

// hungUp reports whether the TCP socket below conn is closed both ways. If it was
// not told the end from here, that means that it has broken. (A Unix socket is hung
// up by every close of its peer.)
func hungUp(conn any) bool {
	hup := false
	_ = control(sock.Below(conn), func(fd int) error {
		events, err := sock.Poll(fd, 0)
		if err != nil || events&unix.POLLHUP == 0 {
			return err
		}
		domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		hup = err == nil && domain != unix.AF_UNIX
		return err
	})
	return hup
}

// pendingError returns the error that the next read or write on conn's socket
// would return, which then does not.
func pendingError(conn any) (err error) {
	_ = control(sock.Below(conn), func(fd int) error {
		errno, failed := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if failed == nil && errno != 0 {
			err = syscall.Errno(errno)
		}
		return nil
	})
	return err
}

func control(socket syscall.Conn, f func(fd int) error) error {
	if socket == nil {
		return nil
	}
	rc, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	if failed := rc.Control(func(fd uintptr) { err = f(int(fd)) }); failed != nil {
		return failed
	}
	return err
}
