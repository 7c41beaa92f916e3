package sock

import (
	"bytes"
	"crypto/tls"
	"reflect"
	"unsafe"
)

// Where a tls.Conn keeps the config of its handshake, what it has read and not
// decrypted, and what it has decrypted and not given out; not known if this Go version
// keeps it elsewhere or as another type.
var (
	tlsConfigOffset, tlsConfigKnown = offsetOf[*tls.Config]("config")
	tlsRawOffset, tlsRawKnown       = offsetOf[bytes.Buffer]("rawInput")
	tlsPlainOffset, tlsPlainKnown   = offsetOf[bytes.Reader]("input")
)

func offsetOf[T any](field string) (uintptr, bool) {
	f, ok := reflect.TypeFor[tls.Conn]().FieldByName(field)
	return f.Offset, ok && f.Type == reflect.TypeFor[T]()
}

// CanForgetTLSConfig reports whether ForgetTLSConfig does anything with this
// version of Go.
func CanForgetTLSConfig() bool { return tlsConfigKnown }

// ForgetTLSConfig cuts the link from a TLS connection, whose handshake is
// complete, to the config of that handshake. Through its callbacks a config of
// Caddy's reaches the whole configuration that made the connection, which a
// connection that outlives a reload would keep in memory; nothing public
// detaches it (read in crypto/tls of Go 1.26: after the handshake a connection
// takes only its random source, record sizing, the cache for session tickets and
// renegotiation from the config, all of which have working zero values: tickets
// are dropped, renegotiation is refused).
//
// Nobody may use conn during the call. Without tlsConfigKnown it does nothing.
func ForgetTLSConfig(conn *tls.Conn) {
	if !tlsConfigKnown || !conn.ConnectionState().HandshakeComplete {
		return
	}
	field := (**tls.Config)(unsafe.Add(unsafe.Pointer(conn), tlsConfigOffset))
	*field = emptyTLSConfig
}

// emptyTLSConfig is shared by all connections; crypto/tls locks what it changes.
var emptyTLSConfig = new(tls.Config)

// Held returns how many bytes a TLS connection has read and not given to its reader,
// those of records that are not complete included; 0 for any other connection, and
// where this version of Go does not show it. Only its reader may call it.
func Held(conn any) int {
	t, ok := conn.(*tls.Conn)
	if !ok || !tlsRawKnown || !tlsPlainKnown {
		return 0
	}
	raw := (*bytes.Buffer)(unsafe.Add(unsafe.Pointer(t), tlsRawOffset))
	plain := (*bytes.Reader)(unsafe.Add(unsafe.Pointer(t), tlsPlainOffset))
	return raw.Len() + plain.Len()
}
