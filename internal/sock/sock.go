// Package sock asks the kernel what a net.Conn's reader and writer cannot tell:
// whether the peer is gone while nobody reads, and whether it still takes what
// was written. On systems other than Linux nothing is known, and callers fall
// back to what their reads and writes return.
package sock

import (
	"context"
	"crypto/tls"
	"net"
	"reflect"
	"syscall"
	"time"
)

// Info is what the kernel knows of a TCP or Unix socket at one moment.
type Info struct {
	// Reset: the connection is broken, and nobody has been told yet.
	Reset bool
	// Finished: the peer will send no more than the Unread bytes.
	Finished bool
	// Unread is the number of bytes that wait to be read.
	Unread int
	// Unacked is the number of bytes written that the peer's kernel has not
	// acknowledged; for Unix sockets, of kernel memory that they take.
	Unacked int
	// Unsent is, for TCP, how many of those have not been sent, because the peer's
	// kernel has no room for them or the network was slower; 0 for Unix sockets.
	Unsent int
	// Acked counts, for TCP, the bytes that the peer's kernel has acknowledged
	// over the connection's life; 0 for Unix sockets.
	Acked uint64
}

// Asker is a connection without a socket that knows such things itself.
type Asker interface{ SockInfo() (Info, bool) }

// Ask returns what is known of the socket, or Asker, below conn, through TLS and other
// wrappers, or false if nothing is.
func Ask(conn any) (Info, bool) {
	if a, ok := conn.(Asker); ok {
		return a.SockInfo()
	}
	if t, ok := conn.(*tls.Conn); ok {
		return Ask(t.NetConn())
	}
	sc := Below(conn)
	if sc == nil {
		return Info{}, false
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return Info{}, false
	}
	var info Info
	var ok bool
	if rc.Control(func(fd uintptr) { info, ok = ask(int(fd)) }) != nil {
		return Info{}, false
	}
	return info, ok
}

// Watch waits until the peer of the socket below conn has finished or reset it, and
// returns what is known then. It returns false when ctx ends, or at once if nothing can
// be known. It reads nothing, and nobody else may read meanwhile; no read deadline is
// left.
func Watch(ctx context.Context, conn any) (Info, bool) {
	socket, ok := Below(conn).(interface {
		syscall.Conn
		SetReadDeadline(t time.Time) error
	})
	if !ok {
		return Info{}, false
	}
	rc, err := socket.SyscallConn()
	if err != nil {
		return Info{}, false
	}
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_ = socket.SetReadDeadline(time.Unix(1, 0)) // long past
	})
	var info Info
	var known bool
	// The runtime calls again whenever something has arrived, be it an end.
	err = rc.Read(func(fd uintptr) bool {
		info, known = ask(int(fd))
		return !known || info.Reset || info.Finished
	})
	if !stop() {
		<-woken
		_ = socket.SetReadDeadline(time.Time{})
	}
	return info, err == nil && known
}

// Below returns the socket at the bottom of conn's wrappers, or nil if there is
// one that hides it.
func Below(conn any) syscall.Conn {
	for conn != nil {
		if c, ok := conn.(syscall.Conn); ok {
			return c
		}
		conn = Inner(conn)
	}
	return nil
}

// Inner returns the connection that conn wraps, or nil if it wraps none or hides it.
func Inner(conn any) any {
	switch c := conn.(type) {
	case interface{ NetConn() net.Conn }: // *tls.Conn
		return c.NetConn()
	case interface{ Raw() net.Conn }: // *proxyproto.Conn
		return c.Raw()
	default:
		return embedded(conn)
	}
}

// embedded returns the net.Conn that a wrapper embeds in its exported field
// Conn, as Caddy's http2Conn does, which has no method to ask for it.
func embedded(conn any) any {
	v := reflect.ValueOf(conn)
	if v.Kind() == reflect.Pointer {
		v = v.Elem()
	}
	if v.Kind() != reflect.Struct {
		return nil
	}
	if f, ok := v.Type().FieldByName("Conn"); !ok || !f.Anonymous {
		return nil
	}
	if inner, ok := reflect.TypeAssert[net.Conn](v.FieldByName("Conn")); ok {
		return inner
	}
	return nil
}
