//go:build unix

package tunnel

import "golang.org/x/sys/unix"

// readsRaw: sockets can be read inside syscall.RawConn.Read.
const readsRaw = true

// readRaw reads from a socket that does not block; again says that there is
// nothing now.
func readRaw(fd uintptr, b []byte) (n int, again bool, err error) {
	for {
		n, err = unix.Read(int(fd), b)
		switch err {
		case nil:
			return n, false, nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, true, nil
		default:
			return 0, false, err
		}
	}
}
