package pluginwire

import (
	"slices"

	"google.golang.org/grpc"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// maxChunk is the maximum size of the output in one message, in bytes.
const maxChunk = 64 << 10

func (s *server) Logs(req *runtimev1.LogsRequest, stream grpc.ServerStreamingServer[runtimev1.LogsResponse]) error {
	reader, ok := s.driver.(runtime.LogReader)
	if !ok {
		return toStatus(unsupported(runtime.AbilityLogs))
	}
	for chunk, err := range reader.Logs(stream.Context(), req.GetSessionId(), req.GetFollow()) {
		if err != nil {
			return toStatus(err)
		}
		for data := range slices.Chunk(chunk.Data, maxChunk) {
			if err := stream.Send(&runtimev1.LogsResponse{Output: outputToProto(chunk.Stream, data)}); err != nil {
				return err
			}
		}
	}
	return nil
}
